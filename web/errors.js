// What a person can understand or mend; its message is shown as it is.
export class UserError extends Error {}
