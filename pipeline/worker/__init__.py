"""The worker process: the only room that imports Faust."""
