"""Pictures to look through: contact sheets and static pages."""
