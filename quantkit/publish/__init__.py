"""A repository as the best quantisers publish it: layout, card, resumable upload."""
