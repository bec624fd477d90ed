"""The denoiser and its codecs: causal Wan2.1 transformer, KV cache, flow matching, text encoder, video codecs."""
