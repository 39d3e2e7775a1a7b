"""An OpenAI-compatible server around transformers' own, and a chat in the terminal that talks to it.

`server.serve` and `chat.chat` are the entry points. What they use needs the extra `serve`, so nothing is imported here.
"""
