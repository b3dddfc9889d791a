"""`peftune init`: a first config from somebody's data, or from another framework's config."""
