"""Write GGUF files for llama.cpp: a merged model with its tokenizer, or an adapter."""
