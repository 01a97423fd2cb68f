"""Images over HTTP, on OpenAI's endpoint, each request with its own preference; see docs/serving.md.

``python -m dblightning serve`` runs it. Needs the extra ``serve``.
"""
