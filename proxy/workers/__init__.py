"""Several processes on one port (`server.workers` over 1).

`parent`: binds the port once, starts the workers as programs of their own that inherit the listening sockets, starts
those anew that die, hands out new settings, and ends them in order. It serves nothing itself, so what it holds in
common for all (`commons`: what counts against limits, the numbers and sums of runs, who made which stored object,
counts of workers that are gone) has one owner, and survives a worker. `seat` is a worker's end of the wire (`channel`),
`limiter` how limits are asked for over it.

The wire is a socket pair, inherited: nobody else can get at it, nothing is left behind in the file system, and its end
tells a worker that its parent died. Two workers never speak to each other but through the parent.
"""
