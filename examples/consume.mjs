// You receive an ONNX file that `ensemble export --with-windows` wrote, and work in JavaScript.
//
//     npm install --ignore-scripts onnxruntime-node
//     node examples/consume.mjs final.onnx recording.json final.onnx.json
//
// The recording is a JSON array of frames, each an array of raw features; final.onnx.json lies beside final.onnx.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.cwd()}/`); // the packages of the working folder
const { InferenceSession, Tensor } = require("onnxruntime-node");
const [file, recording, contract] = process.argv.slice(2);
const { classes, input } = JSON.parse(readFileSync(contract, "utf8"));
const frames = JSON.parse(readFileSync(recording, "utf8"));
if (input.kind !== "features") throw new Error(`expected a file that takes features, got ${input.kind}`);

const session = await InferenceSession.create(file);
const x = new Tensor("float32", Float32Array.from(frames.flat()), [frames.length, input.columns]);
const answer = await session.run({ features: x });
const best = Array.from(answer["class"].data, Number);
console.log(best.filter((index, t) => index !== best[t - 1]).map((index) => classes[index]).join(" "));
const probabilities = answer["probabilities"].data;
const sure = best.map((index, t) => probabilities[t * classes.length + index]);
const mean = sure.reduce((sum, value) => sum + value, 0) / sure.length;
console.log(`${best.length} frames, mean confidence ${mean.toFixed(4)}`);
