"""An agent that remembers each user: before it answers it recalls, after it has answered it remembers.

There is no language model here. A real agent would put what `recall` returns into its prompt; this one prints it.

Start memserve with `make serve`, then run this in another terminal:

    .venv/bin/python examples/agent_memory.py

It prints:

    mia:  I am allergic to peanuts.
          (nothing relevant yet)
    mia:  My sister Lena lives in Oslo.
          (nothing relevant yet)
    noah: I would love to see the northern lights.
          (nothing relevant yet)
    mia:  Is this peanut sauce safe for me?
          recalled: I am allergic to peanuts.
    mia:  Whom could I visit in Norway?
          recalled: My sister Lena lives in Oslo.
    noah: Is this peanut sauce safe for me?
          (nothing relevant yet)
    forgot 4 memories of mia, 2 of noah
"""

import sys
import uuid

import memserve

URL = sys.argv[1] if len(sys.argv) > 1 else None  # MEMSERVE_URL, or http://127.0.0.1:8000

CONVERSATION = [
    ("mia", "I am allergic to peanuts."),
    ("mia", "My sister Lena lives in Oslo."),
    ("noah", "I would love to see the northern lights."),
    ("mia", "Is this peanut sauce safe for me?"),
    ("mia", "Whom could I visit in Norway?"),
    ("noah", "Is this peanut sauce safe for me?"),  # noah never sees what mia has said
]


class UserMemory:
    """One user's memories."""

    def __init__(self, client: memserve.Client, user_id: str) -> None:
        self._client = client
        self._user_id = user_id

    def recall(self, message: str) -> list[memserve.Memory]:
        """The memories that are closest in meaning. A search sees every memory that was acknowledged before it."""
        return self._client.search(self._user_id, message, mode="vector", top_k=3, min_score=0.3)

    def remember(self, message: str) -> None:
        """Keep a message. Returns when it is on disk. The client may send it twice; it is kept once."""
        self._client.add(self._user_id, [{"text": message, "metadata": {"role": "user"}}])

    def forget(self) -> int:
        """Erase the user: every memory, vector and history. Returns the number of memories."""
        return self._client.delete_user(self._user_id).deleted


def main() -> None:
    run = uuid.uuid4()  # the users of this run alone, so that running it twice prints the same
    with memserve.Client(URL) as client:
        users = {name: UserMemory(client, f"{name}-{run}") for name in ("mia", "noah")}
        for name, message in CONVERSATION:
            print(f"{name + ':':<5} {message}")
            recalled = users[name].recall(message)
            print(f"      recalled: {'; '.join(map(str, recalled))}" if recalled else "      (nothing relevant yet)")
            users[name].remember(message)
        print(f"forgot {users['mia'].forget()} memories of mia, {users['noah'].forget()} of noah")


if __name__ == "__main__":
    main()
