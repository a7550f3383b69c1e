// Validate custom resources against the schemas of their own definitions: reads a JSON list of objects from stdin and
// prints a JSON list with a message for each, null where the object is right.
//
//     NODE_PATH=.venv/tools/node_modules node deploy/tools/validate.js
const models = {
  "keda.sh/v1alpha1/ScaledObject": "@kubernetes-models/keda",
  "monitoring.coreos.com/v1/PodMonitor": "@kubernetes-models/prometheus-operator",
};

const objects = JSON.parse(require("fs").readFileSync(0, "utf8"));
const messages = objects.map((object) => {
  const kind = `${object.apiVersion}/${object.kind}`;
  if (!(kind in models)) return `no schema is known for ${kind}`;
  const Model = require(`${models[kind]}/${kind}`)[object.kind];
  try {
    new Model(object).validate();
    return null;
  } catch (error) {
    return error.message;
  }
});
console.log(JSON.stringify(messages));
