"""The demo's server: sessions that take turns on one model, their frames over WebSockets, a page, a gallery."""
