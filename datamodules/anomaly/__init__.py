"""Data for semi-supervised anomaly detection: tables and images."""
