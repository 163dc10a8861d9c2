// Runs a compressed model in onnxruntime-web (wasm) and onnxruntime-node and compares the two.
//
//     npm install --ignore-scripts onnxruntime-web onnxruntime-node
//     node benchmarks/web.mjs small.onnx image 1,1,8,8
//
// Arguments: the model, the name of its input, and the input's shape (filled with numbers between 0 and 1).

import fs from 'node:fs';
import * as web from 'onnxruntime-web';
import node from 'onnxruntime-node';

const [path, input, sizes] = process.argv.slice(2);
if (!sizes) {
  console.error('usage: node web.mjs MODEL INPUT SHAPE');
  process.exit(2);
}
const shape = sizes.split(',').map(Number);
const count = shape.reduce((product, size) => product * size, 1);
const values = Float32Array.from({length: count}, (_, index) => ((index * 2654435761) % 1000) / 1000);
web.env.wasm.numThreads = 1;

const outputs = [];
for (const [name, runtime, model] of [['web', web, fs.readFileSync(path)], ['node', node, path]]) {
  const session = await runtime.InferenceSession.create(model);
  const result = await session.run({[input]: new runtime.Tensor('float32', values, shape)});
  outputs.push(Array.from(Object.values(result)[0].data));
  console.log(`${name}: ${outputs.at(-1).slice(0, 5).map((value) => value.toFixed(5)).join(' ')} ...`);
}
const apart = Math.max(...outputs[0].map((value, index) => Math.abs(value - outputs[1][index])));
const largest = Math.max(...outputs[1].map(Math.abs));
console.log(`largest difference ${apart.toExponential(2)} of ${largest.toFixed(3)}`);
process.exit(apart <= 1e-3 * largest ? 0 : 1);
