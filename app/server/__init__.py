"""The HTTP API: OpenAI's image routes and our own, over the queue that the studio uses too."""
