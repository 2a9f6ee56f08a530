// After the login one goes on to the page that one came for: the browser keeps what follows the # of the
// form's address, and the server what follows the question mark.

document.querySelector("form").action = `login${location.search}${location.hash}`;
