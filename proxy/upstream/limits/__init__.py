"""Rate limits of keys and clients, and the queue of requests that wait for them."""
