// What the npm package `openai` gets from a server, as one JSON object on stdout.
// Usage: node client.mjs URL KEY

import OpenAI, { BadRequestError, AuthenticationError, NotFoundError } from "openai";

const [, , baseURL, apiKey] = process.argv;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const [{ id: model }] = (await client.models.list()).data;
const question = "What is the capital of France? Answer in one sentence.";
const base = { model, messages: [{ role: "user", content: question }], temperature: 0 };
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];

async function whole() {
  const answer = await client.chat.completions.create(base);
  return { ...answer.choices[0], tokens: answer.usage.completion_tokens };
}

async function stream() {
  const options = { stream: true, stream_options: { include_usage: true } };
  let text = "";
  let usage = null;
  for await (const chunk of await client.chat.completions.create({ ...base, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, tokens: usage.completion_tokens };
}

async function completion() {
  const asked = { model, prompt: "The capital of France is", max_tokens: 2, temperature: 0 };
  return (await client.completions.create(asked)).choices[0].text;
}

async function leave() {
  const asked = { model, prompt: "One, two,", max_tokens: 8000, ignore_eos: true, stream: true };
  for await (const chunk of await client.completions.create(asked)) return chunk.object; // aborts
}

async function callTool() {
  const asked = { ...base, tools, tool_choice: "required", parallel_tool_calls: false };
  const helper = client.chat.completions.stream(asked);
  const [call] = (await helper.finalChatCompletion()).choices[0].message.tool_calls;
  return { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
}

async function runTools() {
  const cities = [];
  const asked = {
    ...base,
    max_tokens: 64,
    structured_outputs: {
      regex:
        '<tool_call>\\n\\{"name": "get_weather", "arguments": ' +
        '\\{"city": "(Paris|Rome)"\\}\\}\\n</tool_call>',
    },
    tools: [
      {
        type: "function",
        function: {
          name: "get_weather",
          parameters,
          parse: JSON.parse,
          function: ({ city }) => {
            cities.push(city);
            return "sunny";
          },
        },
      },
    ],
  };
  await client.chat.completions.runTools(asked, { maxChatCompletions: 1 }).done();
  return cities;
}

async function form() {
  const json_schema = { name: "city", schema: parameters, strict: true };
  const response_format = { type: "json_schema", json_schema };
  const answer = await client.chat.completions.parse({ ...base, response_format });
  return answer.choices[0].message.parsed;
}

async function errors() {
  const calls = [
    [BadRequestError, () => client.chat.completions.create({ ...base, temperature: -1 })],
    [NotFoundError, () => client.chat.completions.create({ ...base, model: "gpt-4" })],
    [AuthenticationError, () => client.withOptions({ apiKey: "wrong" }).models.list()],
  ];
  const found = [];
  for (const [kind, call] of calls) {
    try {
      await call();
    } catch (error) {
      if (!(error instanceof kind)) throw error;
      found.push([error.status, error.param, typeof error.requestID]);
    }
  }
  return found;
}

const found = {};
for (const check of [whole, stream, completion, leave, callTool, runTools, form, errors]) {
  found[check.name] = await check();
}
console.log(JSON.stringify(found));
