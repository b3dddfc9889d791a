"""Will it fit, and how long will it take: known before any weight is loaded."""
