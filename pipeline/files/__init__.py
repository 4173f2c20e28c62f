"""CSV and Parquet files in: column mappings, transactions, training data."""
