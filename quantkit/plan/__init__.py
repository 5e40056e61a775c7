"""Everything that metadata alone decides: types, shards, offsets, work."""
