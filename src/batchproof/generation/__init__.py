"""Text with receipts: reading prompts, generating, writing answers, checking them again."""
