"""Settings as frozen values: schema, reading, rules. Imports no tensor library."""
