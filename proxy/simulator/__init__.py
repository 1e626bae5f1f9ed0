"""A simulated OpenAI API on a loopback port, for `openai-proxy demo`: no key, no network, no cost.

`answers` and `responses` make the responses, which depend on the request only; `server` serves them over HTTP. Ids,
times and `x-request-id` are new in every response, as OpenAI's are, so that a cached response can be recognised.
"""
