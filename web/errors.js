// An error for the user; its message is shown unchanged.
export class UserError extends Error {}
