"""Model families of GGUF export, one file each; `gguf_models` lists them."""
