"""The spec: what the user wrote, as one YAML file. Schema, loader, JSON schema. No torch."""
