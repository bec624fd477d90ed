"""Pictures painted by code, which image-to-video starts from."""
