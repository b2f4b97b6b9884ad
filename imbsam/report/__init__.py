"""Compare finished runs: a table, a web page, a picture. Reads logs; imports neither torch nor Lightning."""
