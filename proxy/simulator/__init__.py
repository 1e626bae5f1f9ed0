"""A simulated OpenAI API on a loopback port, for `openai-proxy demo`: no key, no network, no cost.

`answers` and `responses` say what is answered (the same prompt gives the same text, tokens and vectors),
`server` says it over HTTP. Ids, times and `x-request-id` are new with every answer, as OpenAI's are, so that
a cached answer can be told from a second one.
"""
