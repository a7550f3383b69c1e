// Validate custom resources against the schemas of their own definitions: reads a JSON list of objects from stdin and
// prints a JSON list with a message for each, null where the object is right.
//
//     node deploy/tools/validate.mjs .venv/tools
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const packages = {
  "keda.sh/v1alpha1/ScaledObject": "@kubernetes-models/keda",
  "monitoring.coreos.com/v1/PodMonitor": "@kubernetes-models/prometheus-operator",
};

async function problem(object) {
  const kind = `${object.apiVersion}/${object.kind}`;
  if (!(kind in packages)) return `no schema is known for ${kind}`;
  const file = resolve(process.argv[2], "node_modules", packages[kind], `${kind}.js`);
  const models = await import(pathToFileURL(file));
  const Model = models[object.kind] ?? models.default[object.kind]; // one package is ESM, the other CommonJS
  try {
    new Model(object).validate();
    return null;
  } catch (error) {
    return error.message;
  }
}

const objects = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await Promise.all(objects.map(problem))));
