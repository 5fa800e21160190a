"""What tests share: small modules and data, evaluators, several processes."""
