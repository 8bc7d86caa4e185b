"""From a data set to batches: sources, shard writer, read plan, reader."""
