"""The server of the demo. Several viewers share one model; frames go over WebSockets to a page with a gallery."""
