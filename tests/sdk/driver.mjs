// One Node SDK at the end of a pipe: reads calls, a line of JSON each, and writes what their caller saw.
// The same as driver.py; the fields of a call are those of `tests.sdk.kit.Job`.
import { createInterface } from "node:readline";
import { AzureOpenAI, OpenAI } from "openai";
import { VERSION } from "openai/version";

function connect(job) {
  const options = { apiKey: "sk-unused", timeout: 20_000 };
  if (job.max_retries !== null) options.maxRetries = job.max_retries;
  return job.azure
    ? new AzureOpenAI({ ...options, endpoint: job.address, apiVersion: "2024-06-01" })
    : new OpenAI({ ...options, baseURL: `${job.address}/v1` });
}

async function call(client, job, seen) {
  const path = job.method.split(".");
  const name = path.pop();
  const resource = path.reduce((parent, step) => parent[step], client);
  const promise = resource[name](job.fields);
  if (name === "stream") {
    seen.value = await promise.finalChatCompletion();
    return;
  }
  let result;
  if (job.raw) {
    const { data, response } = await promise.withResponse();
    seen.headers = Object.fromEntries(response.headers);
    result = data;
  } else {
    result = await promise;
  }
  if (job.fields.stream) {
    seen.value = [];
    for await (const chunk of result) seen.value.push(chunk);
  } else {
    seen.value = result;
  }
}

async function answer(job) {
  const seen = { value: null, headers: null, error: null };
  try {
    await call(connect(job), job, seen);
  } catch (error) {
    const { status = null, code = null } = error;
    seen.error = { type: error.constructor.name, status, code, message: String(error) };
  }
  return seen;
}

console.log(JSON.stringify({ version: VERSION }));
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await answer(JSON.parse(line))));
}
