"""Transactions on disk, as training reads them."""
