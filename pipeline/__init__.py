"""The autoregressive rollout, many-step sampling and the text-to-video pipeline."""
