"""The passkey experiment: small models trained from scratch under each pattern."""
