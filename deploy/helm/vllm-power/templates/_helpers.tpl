{{- define "vllm-power.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains "vllm-power" .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-vllm-power" .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "vllm-power.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "vllm-power.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "vllm-power.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "vllm-power.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag -}}
{{- printf "%s%s%s" .Values.image.repository (ternary "@" ":" (hasPrefix "sha256:" $tag)) $tag -}}
{{- end -}}

{{- define "vllm-power.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "vllm-power.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "vllm-power.servedName" -}}
{{- default .Values.model.name .Values.model.servedName -}}
{{- end -}}

{{/* The secret with the API key: a given one, or the one that this chart makes; empty without a key. */}}
{{- define "vllm-power.apiKeySecret" -}}
{{- if .Values.apiKey.existingSecret -}}
{{- .Values.apiKey.existingSecret -}}
{{- else if .Values.apiKey.create -}}
{{- printf "%s-api-key" (include "vllm-power.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* Whether the weights lie on a claim that this chart makes. */}}
{{- define "vllm-power.makesClaim" -}}
{{- if and .Values.modelCache.enabled (not .Values.modelCache.existingClaim) -}}true{{- end -}}
{{- end -}}

{{/* What a schema can not say: values that contradict each other. */}}
{{- define "vllm-power.validate" -}}
{{- $needed := add .Values.drain.preStopSeconds .Values.drain.shutdownTimeoutSeconds 15 -}}
{{- if le (int .Values.terminationGracePeriodSeconds) (int $needed) -}}
{{- fail (printf "terminationGracePeriodSeconds is %d: it must be more than %d (drain.preStopSeconds + drain.shutdownTimeoutSeconds + 15), or pods are killed before their requests are done" (int .Values.terminationGracePeriodSeconds) (int $needed)) -}}
{{- end -}}
{{- if include "vllm-power.makesClaim" . -}}
{{- $shared := or (has "ReadWriteMany" .Values.modelCache.accessModes) (has "ReadOnlyMany" .Values.modelCache.accessModes) -}}
{{- if not $shared -}}
{{- if or (gt (int .Values.replicas) 1) .Values.keda.enabled -}}
{{- fail "modelCache.accessModes lets one pod at a time mount the claim, but there may be several: use ReadWriteMany, or one replica without keda" -}}
{{- end -}}
{{- if ne .Values.strategy.type "Recreate" -}}
{{- fail "modelCache.accessModes lets one pod at a time mount the claim, so a rolling update would wait for ever: use ReadWriteMany, or strategy.type Recreate" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.apiKey.create .Values.apiKey.existingSecret -}}
{{- fail "apiKey.create makes a secret and apiKey.existingSecret names another: give one of the two" -}}
{{- end -}}
{{- if and (ne .Values.service.type "ClusterIP") .Values.networkPolicy.enabled -}}
{{- $blocks := list -}}
{{- range .Values.networkPolicy.ingressFrom -}}{{- if .ipBlock -}}{{- $blocks = append $blocks .ipBlock -}}{{- end -}}{{- end -}}
{{- if not $blocks -}}
{{- fail (printf "service.type is %s, but networkPolicy.ingressFrom lets in pods alone, so clients from outside would wait in vain: add their addresses, as in {ipBlock: {cidr: 203.0.113.0/24}}, or set networkPolicy.enabled to false" .Values.service.type) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.keda.enabled (gt (int .Values.keda.minReplicas) (int .Values.keda.maxReplicas)) -}}
{{- fail "keda.minReplicas is more than keda.maxReplicas" -}}
{{- end -}}
{{- end -}}

{{- define "vllm-power.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.resource -}}
{{- $gpus := mul .Values.tensorParallelSize .Values.pipelineParallelSize | toString -}}
{{- $limits := dict .Values.gpu.resource $gpus -}}
{{- $_ := set $resources "limits" (merge $limits (default dict $resources.limits)) -}}
{{- $requests := dict .Values.gpu.resource $gpus -}}
{{- $_ := set $resources "requests" (merge $requests (default dict $resources.requests)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
