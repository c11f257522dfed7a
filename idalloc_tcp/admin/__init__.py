"""The admin pages, by HTTP, on an address of their own: for people, probes and Prometheus.

    pages       what each path answers        (an ASGI application)
      status        a snapshot as JSON, and whether the server is ready
      exposition    a snapshot for Prometheus
      inspection    what a process is doing right now: profiles and tasks
    listening   who may ask, how much, how often, and for how long

Imported only where they are asked for. Nothing here may harm who waits for IDs: few connections
at a time, few a second, one request on each, and a bound on every byte and second.
"""
