"""Several worker processes on one port (`server.workers` above 1).

`supervisor` opens the port, starts the workers as processes that inherit the listening sockets, restarts those that
die, hands out new settings and stops them. It serves no requests. It holds the state that all workers share
(`shared_state`: rate limits, runs, owners of stored objects, metrics of ended workers), so that this state survives a
worker. `worker` is a worker's end of the link to the supervisor; `limiter` and `budgets` ask for limits and budgets
over it.

A link (`ipc`) is an inherited socket pair: no other process can reach it, it leaves no file behind, and when it closes
a worker knows that its supervisor has died. Workers reach each other only through the supervisor.
"""
