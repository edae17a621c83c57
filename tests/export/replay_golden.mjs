// The golden samples of an ONNX artefact through transformers.js; prints the generated token ids of each as JSON.
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from "@huggingface/transformers";
import { readFileSync } from "node:fs";

const root = process.argv.at(-1);
env.allowRemoteModels = false;
env.localModelPath = "/";
const samples = JSON.parse(readFileSync(`${root}/manifest.json`)).golden;
const { dtype } = JSON.parse(readFileSync(`${root}/config.json`))["transformers.js_config"];
const processor = await AutoProcessor.from_pretrained(root);
const model = await AutoModelForImageTextToText.from_pretrained(root, { dtype });
const answers = [];
for (const golden of samples) {
  const content = [{ type: "image" }, { type: "text", text: `\n${golden.question}` }];
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const image = await RawImage.read(`${root}/${golden.image}`);
  const inputs = await processor(image, text, { add_special_tokens: false });
  const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: golden.token_ids.length });
  answers.push(Array.from(output.data, Number).slice(inputs.input_ids.dims.at(-1)));
}
console.log(JSON.stringify(answers));
