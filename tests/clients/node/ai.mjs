// The Vercel `ai` package with @ai-sdk/openai-compatible against BASE_URL: text, stream, objects, tools, embeddings.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const options = { name: "jaxserve", baseURL: process.env.BASE_URL, apiKey: "none", includeUsage: true };
const provider = createOpenAICompatible({ ...options, supportsStructuredOutputs: true });
const model = provider(process.env.MODEL);
const prompt = "What is the capital of France?";
const short = { model, temperature: 0, maxOutputTokens: 60, maxRetries: 0 };

const { text, usage } = await generateText({ ...short, prompt });
assert.match(text, /Paris/);
assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0);

let streamed = "";
for await (const part of streamText({ ...short, prompt }).textStream) streamed += part;
assert.equal(streamed, text);

const city = z.object({ city: z.string().max(12), population: z.number().int().min(0).max(1e8) });
for (const each of [provider, createOpenAICompatible(options)]) {
  const system = each === provider ? undefined : 'Answer as JSON: {"city": string, "population": integer}.';
  const request = { ...short, model: each(process.env.MODEL), system, prompt: "Name a city and its population." };
  if (each === provider) {
    const { output } = await generateText({ ...request, output: Output.object({ schema: city }) });
    assert.equal(typeof output.population, "number");
  } else {
    const { output } = await generateText({ ...request, output: Output.json() });
    assert.equal(typeof output, "object");
  }
}

let asked = 0;
const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
  execute: async ({ city }) => {
    asked += 1;
    return `It is sunny in ${city}.`;
  },
});
const called = await generateText({ ...short, prompt, tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(1) });
assert.ok(asked >= 1);
assert.equal(called.toolCalls[0].toolName, "weather");

const { embeddings } = await embedMany({ model: provider.textEmbeddingModel(process.env.MODEL), values: ["a cat", "a dog"] });
assert.equal(embeddings.length, 2);
console.log("ai + @ai-sdk/openai-compatible: text, stream, objects, tools, embeddings");
