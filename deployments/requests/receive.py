"""How a gateway's HTTP protocol hands the body of a request to the application, past Serve.

Serve reads a body ahead, into memory and without a bound, to notice at once that its client has disconnected. A
gateway's protocol therefore gives Serve a `receive` that tells of the disconnect alone, and the application the one
that reads the body, in the scope.
"""

RECEIVE = "memserve.receive"
"""The key in the scope of the `receive` that reads the body. Without it the application reads from Serve."""
