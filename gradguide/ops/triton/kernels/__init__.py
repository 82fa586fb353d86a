"""Device code. Nothing here knows a torch tensor: kernels go by tables of addresses, and are specialised on layouts."""
