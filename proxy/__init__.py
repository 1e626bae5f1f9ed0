"""A local, OpenAI-compatible caching proxy: `OPENAI_BASE_URL` points here, and nothing else changes.

The picture
===========

A request has one story, and it can be read top to bottom in `journey.py`::

    bytes in -> edge.downstream -> Call -> plan (key or why not) -> look -> Hit ------------------> bytes out
                                                                     |
                                             flight: one buys for all who ask the same now (sharing)
                                                                     |
                                                    exchange: lease a key (gate, limits), send, understand,
                                                    retry or change the key, until an answer is in hand
                                                                     |
                                             plain: read whole, price, keep, receipt -------------> bytes out
                                             stream: relay reads as they come, audit a copy, then the same

Rooms, and what goes where
==========================

- `core/`: every hard decision, pure: values in, values out. No clock, no IO, no asyncio, no aiohttp; `now` is an
  argument. A new rule of the contract starts here, as a table with a test.
- `journey.py` and its rooms (`planning.py`, `shelf.py`, `exchange.py`, `items.py`, `relay.py`, `gate.py`, `runs.py`,
  `telling.py`): the story, on the ports of `core/ports.py` alone. They wait, but know neither aiohttp nor a store's
  driver. `sharing.py` says what equal requests share, `flights.py` who buys and who waits, `reel.py` how a stream flows
  to many, `elsewhere.py` what another process buys. Beside them: `stale.py` (what stands in), `cassettes.py` (record
  and replay), `budgets.py` (what may be spent), `objects.py` (stored objects and their keys), `verdict.py` (what an
  attempt came to), `explaining.py` (why it was not a hit).
- `edge/`: the only rooms that know aiohttp: `downstream` (requests in), `upstream` (requests out, the exception table),
  `passage` (all other routes), `wire` (ready bytes), `gatekeeper` (Host, Origin, keys), `ops`, `cache_admin`,
  `metrics`, `logs`, `tracing`, `server`.
- `providers/`, `selection/`, `stores/`, `limiters/`: plugins. A dialect, a key strategy, a backend is one file and one
  line in the table of the package. They never import each other.
- `ledger/`: what each request was and cost, in a SQLite file: a list on the loop, one thread that writes, reports that
  read beside it. `core/records.py` and `core/reporting.py` say what is written and what it adds up to.
- `config/`: text to frozen settings, all errors at once. `world.py`: settings to machinery, once. `reload.py`: again.
- `workers/`: several processes on one port: the parent that keeps them, what they have in common, the wire between.
- `app.py`: the composition root, the only file that knows everybody. `seams.py`: the only clock.
  `cli/`: one file a command.

Rules
=====

- Decide synchronously, act afterwards: a method that changes shared state never awaits, so one event loop needs no
  locks. State has few owners: the memory store, the key ring with its allowances, the gate, the flights, the runs, the
  receipts.
- Reserve, then settle, on every exit path, cancellation included.
- Keep the bytes: store, forward and replay what came; parse only to decide.
- A hit parses nothing: digest of the raw bytes, memo, memory, ready head, one write.
- Keys are revealed in `world.py` and appear on the upstream socket only.

Imports go one way: `cli -> app -> edge -> journey -> core`; `core` imports only itself. `tests/test_architecture.py`
holds the code to this. What differs from the first sketch: there is no `endpoints/` package, since what differs between
the five endpoints fits in four small tables in `core` (routes, cacheability, usage, estimate).
"""

__version__ = "0.1.0"
