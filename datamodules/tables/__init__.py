"""CSV, Parquet and npz tables: reading and encoding."""
