"""Images from disk to batches: folders, decoding, the cache, class labels."""
