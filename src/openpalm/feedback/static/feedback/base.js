"use strict";

// The token of the cookie, not of the page: after a sign-in in another tab only the cookie is right.
document.addEventListener("htmx:configRequest", (event) => {
  const token = document.cookie.match(/(?:^|; )openpalm_csrf=([^;]+)/);
  if (!token) return;
  event.detail.headers["x-csrftoken"] = token[1];
  delete event.detail.parameters.csrfmiddlewaretoken;
});
