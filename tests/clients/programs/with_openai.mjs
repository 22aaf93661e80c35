// OpenAI's client for Node: texts, token ids, both encodings, and errors.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const url = process.argv[1];
const { texts, ids } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const model = "all-MiniLM-L6-v2";

const vectors = async (body) => (await client.embeddings.create({ model, ...body })).data.map((entry) => entry.embedding);
const refusal = async (body) => {
  try {
    await client.embeddings.create(body);
  } catch (error) {
    return { class: error.constructor.name, code: error.code, param: error.param, message: error.message };
  }
};

const models = [];
for await (const entry of client.models.list()) models.push(entry.id);
console.log(
  JSON.stringify({
    default: await vectors({ input: texts }),
    float: await vectors({ input: texts, encoding_format: "float" }),
    ids: await vectors({ input: ids }),
    "first 64": await vectors({ input: texts, dimensions: 64 }),
    models,
    "other model": await refusal({ model: "text-embedding-3-small", input: texts }),
    "other ids": await refusal({ model, input: [ids[0].slice(1, -1)] }),
    parallel: (await Promise.all(texts.map((text) => vectors({ input: text })))).map(([vector]) => vector),
  }),
);
