"""Changing images: augmentation, style, and what makes two images alike."""
