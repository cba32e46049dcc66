// The npm client `openai` against BASE_URL: chat, stream, parse, tools, embeddings, responses, errors.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const model = process.env.MODEL;
const messages = [{ role: "user", content: "What is the capital of France?" }];
const short = { model, temperature: 0, max_completion_tokens: 60 };

const reply = await client.chat.completions.create({ ...short, messages });
const text = reply.choices[0].message.content;
assert.match(text, /Paris/);

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...short, messages, stream: true })) {
  streamed += chunk.choices[0].delta.content ?? "";
}
assert.equal(streamed, text);

const city = z.object({ city: z.string().max(12), population: z.number().int().min(0).max(1e8) });
const parsed = await client.chat.completions.parse({
  ...short,
  messages: [{ role: "user", content: "Name a city and its population." }],
  response_format: zodResponseFormat(city, "city"),
});
assert.equal(typeof parsed.choices[0].message.parsed.population, "number");

const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      parameters: { type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } }, required: ["city"] },
    },
  },
];
const runner = client.chat.completions.stream({ ...short, messages, tools, tool_choice: "required" });
const called = await runner.finalChatCompletion();
const call = called.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "weather");
assert.equal(typeof JSON.parse(call.function.arguments).city, "string");

const embedded = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
assert.equal(embedded.data.length, 2);
assert.ok(embedded.data[0].embedding.length > 100);

const response = await client.responses.create({ model, input: "What is the capital of France?", temperature: 0, max_output_tokens: 60 });
assert.match(response.output_text, /Paris/);
const next = await client.responses.create({ model, input: "And of Italy?", previous_response_id: response.id, max_output_tokens: 30 });
assert.ok(next.output_text.length > 0);

await assert.rejects(client.chat.completions.create({ ...short, messages, temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
console.log("npm openai: chat, stream, parse, tools, embeddings, responses, errors");
