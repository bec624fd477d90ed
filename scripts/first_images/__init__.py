"""Pictures that are painted by code. Image-to-video starts from them."""
