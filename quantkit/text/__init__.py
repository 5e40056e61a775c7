"""Text: tokenizers, chat templates, corpora, and the token sets that are made of them."""
